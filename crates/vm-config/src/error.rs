//! What is said about a description that cannot be used.

use std::fmt;

/// Why a machine description could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Longer than any real description.
    #[error(
        "{file}: cannot read a machine description of {size_bytes} bytes; the limit is {limit_bytes}: \
         is this the right file?"
    )]
    TooLong {
        /// Name of the file.
        file: String,
        /// Its size.
        size_bytes: usize,
        /// What is read at most.
        limit_bytes: usize,
    },
    /// Nothing but white space.
    #[error(
        "{file}: the machine description is empty; it needs at least {{\"boot-source\": \
         {{\"kernel_image_path\": \"...\"}}}}"
    )]
    Empty {
        /// Name of the file.
        file: String,
    },
    /// Not text.
    #[error("{file}:{line}:{column}: this is not UTF-8 text from here on")]
    NotUtf8 {
        /// Name of the file.
        file: String,
        /// Line of the first bad byte, from 1.
        line: usize,
        /// Column of the first bad byte, from 1.
        column: usize,
    },
    /// Not JSON.
    #[error("{file}:{line}:{column}: this is not JSON: {what}")]
    NotJson {
        /// Name of the file.
        file: String,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// What the parser found.
        what: String,
    },
    /// JSON, but not a description that this build can use.
    #[error("{0}")]
    Wrong(Problems),
}

/// Everything that is wrong with one description, in the order of the text. Never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problems {
    pub(crate) file: String,
    pub(crate) listed: Vec<Problem>,
    pub(crate) unlisted: usize,
}

impl Problems {
    /// The first [`crate::MAX_PROBLEMS`] problems.
    #[must_use]
    pub fn listed(&self) -> &[Problem] {
        &self.listed
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// The field, as `machine-config.vcpu_count`; empty for the whole description.
    pub field: String,
    /// What is wrong, why, and what to do.
    pub what: String,
}

impl fmt::Display for Problems {
    /// One line per problem.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, problem) in self.listed.iter().enumerate() {
            let Problem {
                line,
                column,
                field,
                what,
            } = problem;
            let end = if at == 0 { "" } else { "\n" };
            write!(f, "{end}{}:{line}:{column}: ", self.file)?;
            if !field.is_empty() {
                write!(f, "{field:?}: ")?;
            }
            f.write_str(what)?;
        }
        match self.unlisted {
            0 => Ok(()),
            more => write!(f, "\n{}: and {more} more", self.file),
        }
    }
}
