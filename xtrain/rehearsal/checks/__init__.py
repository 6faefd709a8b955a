"""The checks that come with xtrain; a backend's own are in its folder."""
