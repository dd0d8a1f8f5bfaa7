"""Where a checkpoint's bytes come from: headers and indexes, mapped files, folders, the hub."""
