"""What every kernel stands on: tensors only. Nothing here knows of a call, a plan or a method."""
