"""The contracts that installed plugins bring are held here, beside our own."""

from nope import plugins

globals().update({contract.__name__: contract for contract in plugins.contracts()})


def test_every_installed_plugin_works():
    """One that cannot be read is held to nothing: that is no pass, and stops no other."""
    found = (*plugins.registered(), *plugins.holding())
    assert [plugin.trouble for plugin in found if plugin.trouble] == []
