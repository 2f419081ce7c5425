"""Conversion of weights, configs and tokenizers to and from the file formats of other libraries."""
