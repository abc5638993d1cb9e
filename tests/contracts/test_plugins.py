"""The contracts that installed plugins bring are held here, beside our own."""

from nope import plugins

globals().update({contract.__name__: contract for contract in plugins.contracts()})
