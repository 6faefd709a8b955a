"""The built-in backends, a file or a folder each; installed under the import name `xtrain_backends`."""
