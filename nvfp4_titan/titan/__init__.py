"""The torchtitan plug-in: the only room that imports torchtitan, and only from its modules.

Importing torchtitan fixes its device type, so `cpu_runtime.install()` must be able to run first.
"""
