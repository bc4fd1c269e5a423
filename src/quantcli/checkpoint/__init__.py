"""The checkpoint on disk, read strictly: files, headers, tensors, configuration; a writer of shards.

It reads rows of stored tensors. How quantized numbers become floats is in `sources`."""
