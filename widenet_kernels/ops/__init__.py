"""The operators: one file per stage, each with its schema, fake, autograd and public function."""
