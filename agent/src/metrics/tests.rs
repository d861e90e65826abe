//! What is counted, and how it is shown.

use std::time::Duration;

use super::*;

fn metrics() -> Arc<Metrics> {
    Metrics::new(&["gpu".to_owned(), "cpu".to_owned()])
}

#[track_caller]
fn assert_line(metrics: &Metrics, line: &str) {
    let text = metrics.encode();
    assert!(text.lines().any(|l| l == line), "no line {line:?} in\n{text}");
}

#[test]
fn requests_are_counted_by_pool_status_and_reason() {
    let metrics = metrics();
    metrics.pool(0).request(200, OK, Duration::from_millis(3));
    metrics.pool(0).request(200, OK, Duration::from_millis(3));
    metrics.pool(0).request(200, "client_aborted", Duration::from_millis(3));
    metrics.pool(1).request(503, "fail_closed", Duration::from_secs(1000));
    metrics.unrouted().request(404, "no_route", Duration::ZERO);
    assert_line(&metrics, r#"penstock_requests_total{pool="gpu",status="200",reason="ok"} 2"#);
    assert_line(&metrics, r#"penstock_requests_total{pool="gpu",status="200",reason="client_aborted"} 1"#);
    assert_line(&metrics, r#"penstock_requests_total{pool="cpu",status="503",reason="fail_closed"} 1"#);
    assert_line(&metrics, r#"penstock_requests_total{pool="",status="404",reason="no_route"} 1"#);
    assert_line(&metrics, r#"penstock_request_duration_seconds_bucket{le="0.005",pool="gpu"} 3"#);
    assert_line(&metrics, r#"penstock_request_duration_seconds_bucket{le="655.36",pool="cpu"} 0"#);
    assert_line(&metrics, r#"penstock_request_duration_seconds_count{pool="cpu"} 1"#);
}

#[test]
fn reloaded_pool_keeps_its_series() {
    let metrics = metrics();
    metrics.pool(0).evicted();
    metrics.for_pools(&["gpu".to_owned()]).pool(0).evicted();
    assert_line(&metrics, r#"penstock_evictions_total{pool="gpu"} 2"#);
}

#[test]
fn event_streams_are_measured_by_pool_and_model() {
    let metrics = metrics();
    metrics.limit_models(1);
    let ms = Duration::from_millis;
    let stream = Streamed { first: ms(30), rest: ms(900), messages: 10 };
    metrics.pool(0).streamed("m", &stream);
    metrics.pool(0).streamed("m", &Streamed { messages: 1, rest: Duration::ZERO, ..stream });
    metrics.pool(1).streamed("m", &stream);
    metrics.pool(1).streamed("unheard-of", &stream);
    metrics.pool(1).streamed("", &stream);
    let name = "penstock_gen_ai_server_time_to_first_token_seconds";
    assert_line(&metrics, &format!(r#"{name}_count{{pool="gpu",gen_ai_request_model="m"}} 2"#));
    assert_line(&metrics, &format!(r#"{name}_sum{{pool="gpu",gen_ai_request_model="m"}} 0.06"#));
    assert_line(&metrics, &format!(r#"{name}_count{{pool="cpu",gen_ai_request_model="other"}} 1"#));
    assert_line(&metrics, &format!(r#"{name}_count{{pool="cpu",gen_ai_request_model=""}} 1"#));
    // A stream of one message has no time between messages.
    let name = "penstock_gen_ai_server_time_per_output_token_seconds";
    assert_line(&metrics, &format!(r#"{name}_count{{pool="gpu",gen_ai_request_model="m"}} 1"#));
    assert_line(&metrics, &format!(r#"{name}_sum{{pool="gpu",gen_ai_request_model="m"}} 0.1"#));
    let name = "penstock_gen_ai_server_output_tokens_per_second";
    assert_line(&metrics, &format!(r#"{name}_sum{{pool="cpu",gen_ai_request_model="m"}} 10.0"#));
    assert_line(&metrics, "penstock_metric_models_overflow_total 1");
    // Limit and known names survive a reload.
    metrics.for_pools(&["gpu".to_owned()]).pool(0).tokens("m2", 1, 2);
    assert_line(&metrics, "penstock_metric_models_overflow_total 2");
}

#[test]
fn epp_exchange_buckets_reach_from_microseconds_to_a_minute() {
    let metrics = metrics();
    assert!(!metrics.encode().contains("epp_exchange"));
    metrics.pool(0).epp_exchange(EppOutcome::Picked, Duration::from_micros(40));
    metrics.pool(0).epp_exchange(EppOutcome::FailClosed, Duration::from_secs(59));
    metrics.pool(0).epp_failed("timeout");
    assert_line(&metrics, r#"penstock_epp_exchange_seconds_bucket{le="0.00005",pool="gpu",outcome="picked"} 1"#);
    assert_line(&metrics, r#"penstock_epp_exchange_seconds_bucket{le="30.0",pool="gpu",outcome="fail_closed"} 0"#);
    assert_line(&metrics, r#"penstock_epp_exchange_seconds_bucket{le="60.0",pool="gpu",outcome="fail_closed"} 1"#);
    assert_line(&metrics, r#"penstock_epp_failures_total{pool="gpu",reason="timeout"} 1"#);
}

#[test]
fn replica_has_one_state_at_a_time() {
    let metrics = metrics();
    let replica = &"10.0.0.1:9002";
    metrics.pool(0).epp_replica(replica, None, Some("unknown"));
    metrics.pool(0).epp_replica(replica, Some("unknown"), Some("serving"));
    metrics.pool(0).epp_asked_again("connect");
    assert_line(&metrics, r#"penstock_epp_replicas{pool="gpu",replica="10.0.0.1:9002",state="serving"} 1"#);
    assert_line(&metrics, r#"penstock_epp_asked_again_total{pool="gpu",reason="connect"} 1"#);
    assert_eq!(metrics.encode().matches("penstock_epp_replicas{").count(), 1);
    metrics.pool(0).epp_replica(replica, Some("serving"), None);
    assert!(!metrics.encode().contains("penstock_epp_replicas{"));
}

#[test]
fn guards_count_while_they_are_held() {
    let metrics = metrics();
    let guards = [
        metrics.client_connection(),
        metrics.epp_stream(),
        metrics.pool(1).active_request(),
        metrics.pool(1).active_request(),
    ];
    let gauges = [
        ("penstock_client_connections", 1),
        ("penstock_epp_streams_inflight", 1),
        (r#"penstock_active_requests{pool="cpu"}"#, 2),
    ];
    for (gauge, value) in gauges {
        assert_line(&metrics, &format!("{gauge} {value}"));
    }
    drop(guards);
    for (gauge, _) in gauges {
        assert_line(&metrics, &format!("{gauge} 0"));
    }
}

#[test]
fn slots_are_counted_when_metrics_are_read() {
    let metrics = metrics();
    assert_line(&metrics, "penstock_slots_in_use 0");
    metrics.count_slots(|| SlotsInUse { all: 3, retired: 2 });
    assert_line(&metrics, "penstock_slots_in_use 3");
    assert_line(&metrics, "penstock_slots_retired 2");
}

#[test]
fn endpoints_are_counted_when_metrics_are_read() {
    let metrics = metrics();
    let ready = Arc::new(std::sync::atomic::AtomicUsize::new(2));
    let counted = Arc::clone(&ready);
    let count = move || [1, 0, 0, counted.load(std::sync::atomic::Ordering::Relaxed)];
    metrics.count_endpoints([Box::new(|| [0usize; 4]) as CountEndpoints, Box::new(count)]);
    assert_line(&metrics, r#"penstock_endpoints{pool="cpu",state="draining"} 1"#);
    assert_line(&metrics, r#"penstock_endpoints{pool="cpu",state="ready"} 2"#);
    ready.store(0, std::sync::atomic::Ordering::Relaxed);
    assert_line(&metrics, r#"penstock_endpoints{pool="cpu",state="ready"} 0"#);
    metrics.for_pools(&["gpu".to_owned()]).count_endpoints([Box::new(|| [0, 0, 0, 7usize]) as CountEndpoints]);
    assert_line(&metrics, r#"penstock_endpoints{pool="gpu",state="ready"} 7"#);
    assert!(!metrics.encode().contains(r#"endpoints{pool="cpu""#), "a removed pool has no endpoints");
}

#[test]
fn fallback_attempt_index_is_bounded() {
    let metrics = metrics();
    for index in 0..20 {
        metrics.pool(0).fallback_attempt(index);
    }
    assert_line(&metrics, r#"penstock_fallback_attempts_total{pool="gpu",index="1"} 1"#);
    assert_line(&metrics, r#"penstock_fallback_attempts_total{pool="gpu",index="8+"} 12"#);
    assert!(!metrics.encode().contains(r#"index="0""#));
}

#[test]
fn steering_metrics_are_counted() {
    let metrics = metrics();
    metrics.flow(Path::Ingress, "chunked");
    metrics.body_bytes(Path::Ingress, 10);
    metrics.body_bytes(Path::Relay, 5);
    metrics.steer_stopped("room");
    metrics.steer_events_missed(3);
    metrics.endpoint_connection(Connection::Reused);
    metrics.endpoint_retried("reset");
    metrics.tls_handshake_failed("timeout");
    metrics.client_aborted();
    metrics.pool(0).time_to_first_token(Duration::from_millis(30));
    metrics.pool(0).time_per_output_chunk(Duration::from_millis(30));
    for line in [
        r#"penstock_flows_total{path="ingress",reason="chunked"} 1"#,
        r#"penstock_body_bytes_total{path="local"} 0"#,
        r#"penstock_body_bytes_total{path="ingress"} 10"#,
        r#"penstock_body_bytes_total{path="relay"} 5"#,
        r#"penstock_steer_stops_total{reason="room"} 1"#,
        "penstock_steer_events_missed_total 3",
        r#"penstock_endpoint_connections_total{result="new"} 0"#,
        r#"penstock_endpoint_connections_total{result="reused"} 1"#,
        r#"penstock_endpoint_retries_total{reason="reset"} 1"#,
        "penstock_client_aborts_total 1",
        r#"penstock_ttft_seconds_bucket{le="0.04",pool="gpu"} 1"#,
        r#"penstock_time_per_output_chunk_seconds_bucket{le="0.05",pool="gpu"} 1"#,
    ] {
        assert_line(&metrics, line);
    }
}

#[test]
fn body_models_are_counted_by_the_names_of_bbr() {
    let metrics = metrics();
    for (model, times) in [(BodyModel::Found, 3), (BodyModel::NotFound, 2), (BodyModel::Empty, 1)] {
        (0..times).for_each(|_| metrics.body_model(model));
    }
    assert_line(&metrics, "penstock_bbr_success_total 3");
    assert_line(&metrics, "penstock_bbr_body_field_not_found_total 2");
    assert_line(&metrics, "penstock_bbr_body_field_empty_total 1");
}

#[test]
fn path_has_one_state_at_a_time() {
    let metrics = metrics();
    metrics.set_steering_path(Path::Ingress, true, "passed");
    assert_line(&metrics, r#"penstock_steering_path_active{path="ingress"} 1"#);
    metrics.set_steering_path(Path::Ingress, false, "no \"BTF\"");
    assert_line(&metrics, r#"penstock_steering_path_active{path="ingress"} 0"#);
    assert_line(&metrics, r#"penstock_steering_path_info{path="ingress",reason="no \"BTF\""} 1"#);
    assert_eq!(metrics.encode().matches("steering_path_info{").count(), 1);
}

#[test]
fn doc_comments_are_the_help_texts() {
    let metrics = metrics();
    assert_line(&metrics, "# HELP penstock_client_connections Client connections that are open.");
    assert_line(&metrics, "# TYPE penstock_client_connections gauge");
    assert_line(&metrics, &format!("penstock_build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION")));
    let text = metrics.encode();
    assert!(text.ends_with("# EOF\n"));
    assert!(text.lines().filter(|line| !line.starts_with('#')).all(|line| line.starts_with("penstock_")));
}
