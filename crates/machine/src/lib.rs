//! Validates, builds and drives exactly one VM.
