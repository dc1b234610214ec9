"""The commands of the command line, by what they are about; each one parses, calls and prints."""
