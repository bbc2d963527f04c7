//! Where the guest's console goes, as the VMM's `--console` has it.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Where the guest's console goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Console {
    /// Standard input and output.
    Stdio,
    /// A file, output only.
    File(PathBuf),
    /// A unix socket to listen on.
    Unix(PathBuf),
    /// Nowhere.
    None,
}

impl FromStr for Console {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "none" => Ok(Self::None),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => Err("write stdio, file:PATH, unix:PATH or none".into()),
        }
    }
}

impl fmt::Display for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdio => f.write_str("stdio"),
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::None => f.write_str("none"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_is_handed_on_as_it_was() {
        for text in ["stdio", "none", "file:log.txt", "unix:/run/a:b"] {
            assert_eq!(text.parse::<Console>().unwrap().to_string(), text);
        }
        for text in ["", "file", "file:", "unix:", "tcp:1", "Stdio", "none:"] {
            assert!(text.parse::<Console>().is_err(), "{text}");
        }
    }
}
