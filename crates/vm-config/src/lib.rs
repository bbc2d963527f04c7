//! Wire types of a machine description.
