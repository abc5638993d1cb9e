"""Facts as words that an estimator spends and a claim asserts, so that the two can be compared.

An estimator that puts a fact in the place of draws would find it true whatever the layers do;
a claim that asserts the fact must therefore be measured without it.
"""

from __future__ import annotations


def gain(role: str) -> str:
    """E W W' = fan_out sigma^2 I: a map multiplies inner products by fan_in sigma^2 on average.

    >>> gain("value")
    "E W W' = fan_out sigma^2 I for the value map"
    """
    return f"E W W' = fan_out sigma^2 I for the {role} map"
