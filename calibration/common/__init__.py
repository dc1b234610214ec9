"""What every package uses: errors, files, TOML, versions, arrays."""
