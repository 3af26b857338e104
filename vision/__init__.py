"""The vision track: every public file of this folder is one pipeline and one command of `rlboard vision`."""
