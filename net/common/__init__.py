"""Shared by every command: command lines, errors, files, progress, the device."""
