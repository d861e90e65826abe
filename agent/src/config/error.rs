//! The errors of a configuration: at most one per key, with its position and what was expected.

use std::fmt;

/// Why a configuration is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read, or is not UTF-8.
    #[error("{file}: cannot be read: {reason}")]
    Unreadable {
        /// Its path, as it was given.
        file: String,
        /// The operating system's text.
        reason: String,
    },
    /// The text is not TOML. Only the syntax is checked then, because text after a broken line cannot be interpreted.
    #[error("{file}:{position}: not valid TOML: {message}")]
    Syntax {
        /// Path of the configuration.
        file: String,
        /// Where the parser stopped.
        position: Position,
        /// The parser's text.
        message: String,
    },
    /// A key that does not exist, is missing, or has a value that it cannot have.
    #[error("{file}:{position}: {key}: found {found}, expected {expected}")]
    Value {
        /// Path of the configuration.
        file: String,
        /// A key that is missing has the position of its section.
        position: Position,
        /// Dotted, as in `pools[1].picker.address`.
        key: String,
        /// The value as written, or what is the matter with it.
        found: String,
        /// What the key accepts.
        expected: String,
    },
}

/// A position in a file. Line and column start at 1; the column counts characters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// From 1; 0 stands for the whole file.
    pub line: usize,
    /// In characters, from 1.
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
    /// Path of the configuration.
    pub file: String,
    /// Where the old name stands.
    pub position: Position,
    /// Dotted, as in `limits.headers`.
    pub old_key: String,
    /// Its name from now on, dotted.
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

    /// The errors in file order.
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
