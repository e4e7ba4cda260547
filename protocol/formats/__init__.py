"""How families of models write tool calls and thoughts, and parsers that read them back from journals.

Pure and light: the gateway parses with it, the scheduler finds out at load which format a model's template writes.
"""
