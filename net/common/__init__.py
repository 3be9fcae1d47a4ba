"""What every command uses: command lines, errors, files, progress, the device."""
