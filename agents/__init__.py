"""The reinforcement-learning track: every public file of this folder is one agent and one command."""
