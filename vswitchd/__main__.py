"""`python -m vswitchd`: runs the daemon in the foreground."""

from vswitchd.main import main

if __name__ == "__main__":
    raise SystemExit(main())
