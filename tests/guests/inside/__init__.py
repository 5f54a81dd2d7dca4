"""Tests that run where stock guests boot: `make guests` starts them, a plain pytest leaves them alone."""
