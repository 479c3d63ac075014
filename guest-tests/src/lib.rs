//! Guests for tests, as images.
