"""The families: one file each, named like the Hugging Face `model_type`; adding the file is all there is to do.

A family file defines `FAMILY`: the configurations it reads, how the model is built from stock mixins, and an
invertible weight map. Files that start with an underscore are shared by all families.
"""
