//! Parameters and capabilities.

use serde_json::{Value, json};

use super::Setup;
use crate::control::command::*;

#[tokio::test]
async fn parameters_and_capabilities_are_checked_and_set() {
    let setup = Setup::new();
    let mut client = setup.client().await;
    let set = json!({"downtime-limit": 50, "max-bandwidth": u64::MAX, "announce-rounds": 2,
        "max-postcopy-bandwidth": 5, "x-postcopy-after-rounds": 3, "x-postcopy-after-time": 1500,
        "x-postcopy-no-convergence": true, "multifd-compression": "zstd",
        "multifd-channels": 4, "multifd-zstd-level": 3, "xbzrle-cache-size": 8192, "cpu-throttle-initial": 30,
        "cpu-throttle-tailslow": true, "x-migration-timeout": 5000,
        "x-migration-timeout-action": "postcopy", "x-vcpu-dirty-limit-period": 500});
    client.execute("migrate-set-parameters", set).await.unwrap();
    assert_eq!(
        client
            .execute("query-migrate-parameters", json!({}))
            .await
            .unwrap(),
        json!({
            "max-bandwidth": u64::MAX, "avail-switchover-bandwidth": 0, "downtime-limit": 50,
            "announce-initial": 50, "announce-max": 550, "announce-rounds": 2,
            "announce-step": 100, "max-postcopy-bandwidth": 5, "x-postcopy-after-rounds": 3,
            "x-postcopy-after-time": 1500, "x-postcopy-no-convergence": true,
            "multifd-channels": 4, "multifd-compression": "zstd", "multifd-zstd-level": 3, "xbzrle-cache-size": 8192,
            "throttle-trigger-threshold": 50, "cpu-throttle-initial": 30,
            "cpu-throttle-increment": 10, "cpu-throttle-tailslow": true, "max-cpu-throttle": 99,
            "vcpu-dirty-limit": 1, "x-vcpu-dirty-limit-period": 500,
            "x-migration-timeout": 5000, "x-migration-timeout-action": "postcopy",
        })
    );
    for (arguments, desc) in [
        (
            json!({"max-bandwidth": "5"}),
            "Invalid parameter type for 'max-bandwidth', expected: integer",
        ),
        (
            json!({"multifd-compression": "zlib"}),
            "Parameter 'multifd-compression' does not accept value 'zlib': it is none, lz4 \
             (fast), or zstd (smaller)",
        ),
        (
            json!({"multifd-zstd-level": 21}),
            "Parameter 'multifd-zstd-level' expects a value between 1 and 20, got 21",
        ),
        (
            json!({"xbzrle-cache-size": 5000}),
            "Parameter 'xbzrle-cache-size' expects a power of two no less than the target page \
             size of 4096 bytes, got 5000",
        ),
        (
            json!({"max-bandwidth": 1.5}),
            "Parameter 'max-bandwidth' expects uint64",
        ),
        (
            json!({"max-bandwidth": -1}),
            "Parameter 'max-bandwidth' expects uint64",
        ),
        (
            json!({"downtime-limit": 2_000_001, "max-bandwidth": 1}),
            "Parameter 'downtime-limit' expects an integer in the range of 0 to 2000000 ms, \
             got 2000001",
        ),
        (
            json!({"announce-step": 10_001}),
            "Parameter 'announce-step' expects a value between 0 and 10000",
        ),
        (
            json!({"x-vcpu-dirty-limit-period": 1001}),
            "Parameter 'x-vcpu-dirty-limit-period' expects a value between 1 and 1000, got 1001",
        ),
        (
            json!({"multifd-channels": 256}),
            "Parameter 'multifd-channels' expects a value between 1 and 255, got 256",
        ),
        (
            json!({"multifd-queues": 2}),
            "Parameter 'multifd-queues' is unexpected",
        ),
    ] {
        assert_eq!(
            client.refused("migrate-set-parameters", arguments).await,
            desc
        );
    }
    assert_eq!(setup.machine.parameters().max_bandwidth, u64::MAX);

    let capability =
        |name: &str, state: Value| json!({"capabilities": [{"capability": name, "state": state}]});
    let set = capability("events", json!(false));
    client
        .execute("migrate-set-capabilities", set)
        .await
        .unwrap();
    let set = capability("postcopy-ram", json!(true));
    client
        .execute("migrate-set-capabilities", set)
        .await
        .unwrap();
    let Capabilities {
        auto_converge,
        dirty_limit,
        events,
        postcopy_ram,
        xbzrle,
        multifd,
        zero_copy_send,
        page_checksum,
    } = setup.machine.capabilities();
    assert!(!auto_converge && !dirty_limit && !events && postcopy_ram && !xbzrle && !multifd);
    assert!(!zero_copy_send && page_checksum);
    for (arguments, desc) in [
        (json!({}), "Parameter 'capabilities' is missing"),
        (
            capability("rdma-pin-all", json!(true)),
            "Parameter 'capability' does not accept value 'rdma-pin-all'",
        ),
        (
            capability("events", json!(1)),
            "Invalid parameter type for 'capabilities[0].state', expected: boolean",
        ),
    ] {
        assert_eq!(
            client.refused("migrate-set-capabilities", arguments).await,
            desc
        );
    }
}
