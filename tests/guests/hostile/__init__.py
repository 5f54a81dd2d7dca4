"""A virtual machine whose guest means harm, and what it must not be able to do."""
