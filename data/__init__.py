"""Image-text pairs: the embedded set (emoji), tar shards, crops and colours, text, batches."""
