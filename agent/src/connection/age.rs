//! The age of a client's connection, and when it is too old for new requests (`listen.max_connection_age`).

use tokio::time::{Instant, sleep_until};

use crate::{config::Config, worker::Current};

/// The limit differs by connection by up to this part of it, so that connections which were made together do not end together.
const JITTER: f64 = 0.1;

#[derive(Debug, Clone, Copy)]
pub(super) struct ConnectionAge {
    begun: Instant,
    /// What the limit is multiplied with.
    share: f64,
}

impl ConnectionAge {
    /// That of a connection which began at `begun`.
    pub(super) fn since(begun: Instant) -> Self {
        Self { begun, share: 1.0 - JITTER + 2.0 * JITTER * fastrand::f64() }
    }

    /// When the connection is too old; `None` without a limit.
    pub(super) fn ends(&self, config: &Config) -> Option<Instant> {
        Some(self.begun + config.listen.max_connection_age?.mul_f64(self.share))
    }

    /// Resolves when the connection is too old under the current configuration.
    pub(super) async fn passed(&self, current: &Current) {
        loop {
            let ends = self.ends(&current.worker().shared.config);
            let passed = async {
                match ends {
                    Some(ends) => sleep_until(ends).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = passed => return,
                () = current.replaced() => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn limits_differ_by_up_to_a_tenth() {
        let mut config = Config::default();
        let now = Instant::now();
        assert_eq!(ConnectionAge::since(now).ends(&config), None);
        let limit = Duration::from_secs(1000);
        config.listen.max_connection_age = Some(limit);
        let ages: Vec<_> = (0..1000).map(|_| ConnectionAge::since(now).ends(&config).unwrap() - now).collect();
        let (least, most) = (ages.iter().min().unwrap(), ages.iter().max().unwrap());
        assert!(*least >= limit * 9 / 10 && *most <= limit * 11 / 10, "{least:?} {most:?}");
        assert!(*most - *least > limit / 10, "{least:?} {most:?}");
    }
}
