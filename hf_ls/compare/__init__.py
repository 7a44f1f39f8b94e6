"""Many runs and one verdict: the same data, batches and steps for every epsilon and seed, and paired differences between them."""
