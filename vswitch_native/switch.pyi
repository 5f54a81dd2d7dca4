"""Typed surface of the native `switch` submodule."""

class EndpointHandle:
    """A native endpoint (made by `vswitch_native.netvsp` or `InProcessEndpoint`) on its way to `Datapath.attach`."""

    @property
    def available(self) -> bool:
        """False once a datapath has taken the endpoint."""
