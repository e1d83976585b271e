"""The papers: a folder each, with its cells, published numbers, tables and claims."""
