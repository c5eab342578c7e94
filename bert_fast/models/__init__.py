"""The thin BERT: modules that hold weights and say the maths, on packed tokens. The kernels are in
ops; text, training and Hugging Face's own models live elsewhere."""
