"""`python -m vswitchctl` is `vswitch`."""

from vswitchctl.main import main

if __name__ == "__main__":
    main()
