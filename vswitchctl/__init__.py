"""The client of vswitch: a library (`vswitchctl.client`) and the command `vswitch`. Both speak the
API alone.
"""
