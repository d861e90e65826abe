//! What can be wrong with a configuration, one error per key, each with its place and what would be right.

use std::fmt;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("{file}: cannot be read: {reason}")]
    Unreadable { file: String, reason: String },
    /// The text is not TOML. Nothing beyond syntax is checked then: what follows a broken line means little.
    #[error("{file}:{line}: not valid TOML: {message}")]
    Syntax { file: String, line: usize, message: String },
    #[error("{file}:{line}: {key}: found {found}, expected {expected}")]
    Value {
        file: String,
        /// From 1. A key that is missing has the line of its section.
        line: usize,
        /// Dotted, as in `pools[1].picker.address`.
        key: String,
        found: String,
        expected: String,
    },
}

impl ConfigError {
    /// Line in the file, from 1; 0 where the error is about all of it.
    pub fn line(&self) -> usize {
        match self {
            Self::Unreadable { .. } => 0,
            Self::Syntax { line, .. } | Self::Value { line, .. } => *line,
        }
    }
}

/// At least one error, in the order of lines. Displays as one per line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors(Vec<ConfigError>);

impl ConfigErrors {
    /// `Err` with the errors ordered, `Ok` if there are none.
    pub(super) fn check(mut errors: Vec<ConfigError>) -> Result<(), Self> {
        errors.sort_by_key(ConfigError::line);
        if errors.is_empty() { Ok(()) } else { Err(Self(errors)) }
    }

    pub fn iter(&self) -> impl Iterator<Item = &ConfigError> {
        self.0.iter()
    }
}

impl From<ConfigError> for ConfigErrors {
    fn from(error: ConfigError) -> Self {
        Self(vec![error])
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            error.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}
