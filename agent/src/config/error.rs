//! The errors of a configuration: at most one per key, with its position and what was expected.

use std::fmt;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("{file}: cannot be read: {reason}")]
    Unreadable { file: String, reason: String },
    /// The text is not TOML. Only the syntax is checked then, because text after a broken line cannot be interpreted.
    #[error("{file}:{position}: not valid TOML: {message}")]
    Syntax { file: String, position: Position, message: String },
    #[error("{file}:{position}: {key}: found {found}, expected {expected}")]
    Value {
        file: String,
        /// A key that is missing has the position of its section.
        position: Position,
        /// Dotted, as in `pools[1].picker.address`.
        key: String,
        found: String,
        expected: String,
    },
}

/// A position in a file. Line and column start at 1; the column counts characters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    pub line: usize,
    pub column: usize,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// A key under its name from the previous version. Its value is used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file}:{position}: {old_key} is now {key}; the next version does not accept the old name")]
pub struct ConfigWarning {
    pub file: String,
    pub position: Position,
    /// Dotted, as in `limits.headers`.
    pub old_key: String,
    pub key: String,
}

impl ConfigError {
    /// The line in the file, from 1; 0 if the error concerns the whole file.
    pub fn line(&self) -> usize {
        self.position().line
    }

    fn position(&self) -> Position {
        match self {
            Self::Unreadable { .. } => Position::default(),
            Self::Syntax { position, .. } | Self::Value { position, .. } => *position,
        }
    }
}

/// One or more errors in file order. Displays one per line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors(Vec<ConfigError>);

impl ConfigErrors {
    /// Returns `Err` with the errors in file order, `Ok` if the list is empty.
    pub(super) fn check(mut errors: Vec<ConfigError>) -> Result<(), Self> {
        errors.sort_by_key(ConfigError::position);
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
