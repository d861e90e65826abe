//! Writes `docs/performance.md` from a report.

use std::fmt::Write as _;

use super::report::{Report, Row};

pub(super) fn text(report: &Report) -> String {
    let Report { machine, command, rounds, .. } = report;
    let mut text = format!(
        "# Performance\n\n\
         What a request and a token cost Penstock, Envoy with the same EPP, and nginx, which forwards to one endpoint without a pick. \
         Written by\n\n```\n{command}\n```\n\n\
         which installs the peers, starts them with the configurations in [tests/bench/](../tests/bench/), and checks every byte. \
         Medians of {rounds} rounds in which the proxies took turns. Measured on: {machine}. Client, endpoint and EPP shared these \
         cores, so compare ratios; times depend on the machine.\n\n"
    );
    text.push_str(&report.table());
    text.push_str("\n## Loads\n\n");
    let mut loads: Vec<&Row> = Vec::new();
    for row in &report.rows {
        if !loads.iter().any(|load| load.scenario == row.scenario) {
            loads.push(row);
            let _ = writeln!(text, "- **{}**: {}.", row.scenario, row.explanation);
        }
    }
    text.push_str(
        "\n## Figures\n\n\
         | figure | meaning |\n\
         |---|---|\n\
         | CPU µs | CPU time of the proxy's processes for each request, or for each token of a stream (`/proc/PID/task/*/schedstat`); \
         what the kernel does in its own threads or while the endpoint or the client sends is not included |\n\
         | of Envoy, of nginx | the median of each round's ratio; below 1 Penstock needs less |\n\
         | EPP µs | CPU time of the EPP for each pick: it answers as production EPPs do (every header echoed, the body echoed in \
         pieces of 62 000 bytes, response headers answered) |\n\
         | p50, p99 | of the whole request (closed loop: a client sends its next request after the response), or of the time to the \
         first event of a stream (streams begin at fixed times) |\n\
         | RSS MiB | peak of resident memory of the proxy's processes |\n\n\
         Proxies have as many threads as the machine has cores, and no access log. `EPP`: the EPP sees the heads of responses \
         (`response_to_picker = \"headers\"`). `usage` is Penstock's default and is compared with Envoy that sends bodies in both \
         directions (`bodies`). `steering auto` unless named.\n\n## Where Penstock loses\n\n",
    );
    let losses: Vec<String> = report.rows.iter().flat_map(losses).collect();
    if losses.is_empty() {
        text.push_str("In none of these figures.\n");
    }
    for loss in losses {
        let _ = writeln!(text, "- {loss}");
    }
    text
}

/// Where Penstock with an EPP needs more than Envoy, or without one more than nginx.
fn losses(row: &Row) -> Vec<String> {
    if !row.proxy.starts_with("penstock") {
        return Vec::new();
    }
    let named = if row.epp.is_some() { "Envoy" } else { "nginx" };
    let of = |envoy: Option<f64>, nginx: Option<f64>| if row.epp.is_some() { envoy } else { nginx };
    let figures = [
        (format!("CPU time per {}", row.unit), of(row.cpu_to_envoy, row.cpu_to_nginx)),
        ("the EPP's CPU time for each pick".to_owned(), row.epp_to_envoy),
        ("p99".to_owned(), of(row.p99_to_envoy, row.p99_to_nginx)),
    ];
    let more = figures.into_iter().filter_map(|(figure, ratio)| Some((figure, ratio.filter(|ratio| *ratio > 1.0)?)));
    more.map(|(figure, ratio)| format!("{}, {}: {figure} is {ratio:.2} of {named}'s", row.scenario, row.proxy))
        .collect()
}
