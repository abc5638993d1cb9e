"""A plugin for nope-theory: LayerScale, GPT-NeoX's initialisation, and claims about both."""
