"""What is measured, against which peer; each file is a command."""
