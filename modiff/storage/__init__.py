"""Files that are whole or absent: atomic writes, content hashes, locks, the cache, folders of tensors."""
