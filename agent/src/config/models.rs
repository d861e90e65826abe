//! `[models]`: who answers `GET /v1/models`.

use std::time::Duration;

use super::{
    settings::{choice, settings},
    value::{self, duration},
};

settings! {
    /// The list of models, `GET /v1/models`.
    #[derive(Copy)]
    pub struct ModelListing {
        /// Who answers for it.
        pub list: ModelList = ModelList::Routed => value::choice(),
        /// With `list = "merged"`: how long the pools may take. One that has not answered by then is left out.
        pub timeout: Duration = Duration::from_secs(2) => duration(),
    }
}

choice! {
    /// Who answers for the list of models.
    pub enum ModelList {
        /// The pool of the request's route, as for every other request.
        Routed = "routed",
        /// The agent: it asks an endpoint of every pool at once, with the client's fields, and answers with all of their models, each
        /// once. Model names of routes and of `bbr.base_models` that no endpoint lists are added. No EPP is asked.
        Merged = "merged",
    }
}
