//! Errors for bodies that cannot be routed, with the offset, what was found and what was expected.

use std::fmt;

use http::StatusCode;

use super::form::FormError;
use crate::http::coding::CodingError;

/// Why a request is refused because of its body.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NamingError {
    #[error("cannot read the model from the JSON body: {0}")]
    Json(#[from] JsonError),
    #[error("the body names no model: found {found}, expected the name of a model")]
    Missing { found: &'static str },
    #[error("cannot read the model from the form: {0}")]
    Form(#[from] FormError),
    #[error("{0}")]
    Coding(#[from] CodingError),
}

impl NamingError {
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Coding(CodingError::Unsupported { .. }) => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Coding(CodingError::TooLarge { .. }) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Coding(CodingError::NoRoom) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Json(_) | Self::Form(_) | Self::Missing { .. } | Self::Coding(_) => StatusCode::BAD_REQUEST,
        }
    }

    /// Label for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Json(_) => "json",
            Self::Form(_) => "form",
            Self::Missing { .. } => "model_missing",
            Self::Coding(CodingError::Unsupported { .. }) => "content_coding",
            Self::Coding(CodingError::TooLarge { .. }) => "decoded_body_too_large",
            Self::Coding(CodingError::NoRoom) => "bodies_full",
            Self::Coding(CodingError::Corrupt { .. } | CodingError::Truncated { .. }) => "coded_body",
        }
    }
}

/// Why a body cannot be read as a JSON document with one model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("byte {offset}: found {found}, expected {expected}")]
pub struct JsonError {
    /// Offset in the body, from 0.
    pub offset: u64,
    /// What is at this offset.
    pub found: Found,
    /// What may be there, as the message names it.
    pub expected: &'static str,
}

/// What was found where something else was expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// A byte that the grammar (or UTF-8) does not allow here.
    Byte(u8),
    /// The body ends inside the document.
    EndOfInput,
    /// An object or array within [`MAX_DEPTH`](super::MAX_DEPTH) others.
    TooDeep,
    /// A second top-level `model`, of which parsers use either.
    SecondModel,
    /// A model of more than [`MAX_MODEL`](super::MAX_MODEL) bytes.
    LongModel,
    /// In the model's name only; elsewhere a lone surrogate passes.
    LoneSurrogate,
    /// In the model's name only: no header field can carry it.
    ControlCharacter,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Found::Byte(byte @ 0x21..=0x7e) => write!(f, "`{}`", char::from(*byte)),
            Found::Byte(byte) => write!(f, "byte 0x{byte:02x}"),
            Found::EndOfInput => f.write_str("the end of the body"),
            Found::TooDeep => f.write_str("one more level of nesting"),
            Found::SecondModel => f.write_str("a second top-level key \"model\""),
            Found::LongModel => f.write_str("a longer model"),
            Found::LoneSurrogate => f.write_str("a model with a lone surrogate"),
            Found::ControlCharacter => f.write_str("a model with a control character"),
        }
    }
}
