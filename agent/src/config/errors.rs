//! `[errors]`: the form of the agent's own answers.

use super::{
    settings::{choice, settings},
    value,
};

settings! {
    /// The agent's own answers.
    pub struct Errors {
        /// Their form, where `Accept` prefers neither.
        pub format: ErrorFormat = ErrorFormat::OpenAi => value::choice(),
    }
}

choice! {
    /// The form of the agent's own answers.
    pub enum ErrorFormat {
        /// JSON: `{"error": {"message", "type", "param", "code"}}`.
        OpenAi = "openai",
        /// Text: the message, and the reason on a line of its own.
        Plain = "plain",
    }
}
