"""The built-in backends, one file each; installed under the import name `xtrain_backends`."""
