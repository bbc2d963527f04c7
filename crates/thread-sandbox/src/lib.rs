//! Thread roles and their seccomp filters.
