"""Where batches come from: sources of rows, and the pipeline that shuffles and batches them."""
