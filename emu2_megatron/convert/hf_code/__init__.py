"""Files that travel with an export, for `trust_remote_code=True`. They import nothing of this package."""
