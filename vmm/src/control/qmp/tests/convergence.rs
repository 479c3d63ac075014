//! Guests that don't converge: what they write, what would help, and limiting their vCPUs.

use serde_json::json;

use super::Setup;
use crate::control::command::*;

#[tokio::test]
async fn a_forecast_is_for_the_link_that_is_given_or_known() {
    let setup = Setup::new();
    let mut client = setup.client().await;
    let name = "x-query-migration-forecast";
    setup.machine.state().parameters.max_bandwidth = 0;
    let refused = client.refused(name, json!({})).await;
    assert!(refused.contains("give it"), "{refused}");
    let refused = client.refused(name, json!({"bandwidth": 0})).await;
    assert!(refused.contains("at least 1, got 0"), "{refused}");

    setup.machine.state().forecast = MigrationForecast {
        least_downtime: 4,
        throttle_needed: Some(40),
        memory: 7,
        dirty_rate: 8,
        ..MigrationForecast::default()
    };
    // Measured, limited, assumed, given: the last that is there counts.
    let mut expected = json!({
        "converges": false, "least-downtime": 4, "throttle-needed": 40,
        "memory": 7, "dirty-rate": 8, "bandwidth": 1,
    });
    setup.machine.state().info.ferry = Some(FerryMigrationInfo {
        bandwidth: Some(1),
        ..Default::default()
    });
    let told = client.execute(name, json!({})).await.unwrap();
    assert_eq!(told, expected);
    setup.machine.state().parameters.max_bandwidth = 2;
    let told = client.execute(name, json!({})).await.unwrap();
    assert_eq!(told["bandwidth"], 2);
    setup.machine.state().parameters.avail_switchover_bandwidth = 3;
    let told = client.execute(name, json!({})).await.unwrap();
    assert_eq!(told["bandwidth"], 3);
    expected["bandwidth"] = json!(4);
    let told = client.execute(name, json!({"bandwidth": 4})).await.unwrap();
    assert_eq!(told, expected);

    setup.machine.state().failure = Some(CommandError::generic("not measured"));
    assert_eq!(
        client.refused(name, json!({"bandwidth": 4})).await,
        "not measured"
    );
}

#[tokio::test]
async fn vcpus_are_limited_and_let_go_one_or_all() {
    let setup = Setup::new();
    let mut client = setup.client().await;
    for (command, arguments, call) in [
        (
            "set-vcpu-dirty-limit",
            json!({"dirty-rate": 200, "cpu-index": 1}),
            "set_vcpu_dirty_limit 200 Some(1)",
        ),
        (
            "set-vcpu-dirty-limit",
            json!({"dirty-rate": 200}),
            "set_vcpu_dirty_limit 200 None",
        ),
        (
            "cancel-vcpu-dirty-limit",
            json!({"cpu-index": 1}),
            "cancel_vcpu_dirty_limit Some(1)",
        ),
        (
            "cancel-vcpu-dirty-limit",
            json!({}),
            "cancel_vcpu_dirty_limit None",
        ),
    ] {
        let told = client.execute(command, arguments).await.unwrap();
        assert_eq!(told, json!({}), "{call}");
        assert_eq!(setup.machine.calls(), [call]);
    }
    for (arguments, desc) in [
        (json!({"cpu-index": 1}), "Parameter 'dirty-rate' is missing"),
        (
            json!({"cpu-index": -1, "dirty-rate": 5}),
            "Parameter 'cpu-index' expects uint64",
        ),
    ] {
        let refused = client.refused("set-vcpu-dirty-limit", arguments).await;
        assert_eq!(refused, desc);
    }
    assert!(setup.machine.calls().is_empty());

    let limited = |cpu_index, rate_is_average| DirtyLimitInfo {
        cpu_index,
        limit_rate: 200,
        current_rate: 190,
        throttle_percentage: 35,
        rate_is_average,
    };
    setup.machine.state().dirty_limits = vec![limited(0, false), limited(2, true)];
    let limits = client.execute("query-vcpu-dirty-limit", json!({})).await;
    assert_eq!(
        limits.unwrap(),
        json!([
            {"cpu-index": 0, "limit-rate": 200, "current-rate": 190, "x-throttle-percentage": 35},
            {"cpu-index": 2, "limit-rate": 200, "current-rate": 190, "x-throttle-percentage": 35,
                "x-rate-is-average": true},
        ])
    );
}

#[tokio::test]
async fn what_each_vcpu_writes_is_told_where_it_is_known() {
    let setup = Setup::new();
    let mut client = setup.client().await;
    let vcpu = |id, dirty_rate| DirtyRateVcpu { id, dirty_rate };
    setup.machine.state().dirty_rate = DirtyRateInfo {
        dirty_rate: Some(12),
        status: DirtyRateStatus::Measured,
        mode: DirtyRateMode::DirtyBitmap,
        vcpu_dirty_rate: Some(vec![vcpu(0, 12), vcpu(1, 0)]),
        ..Default::default()
    };
    let info = client.execute("query-dirty-rate", json!({})).await.unwrap();
    assert_eq!(
        info["vcpu-dirty-rate"],
        json!([{"id": 0, "dirty-rate": 12}, {"id": 1, "dirty-rate": 0}])
    );
    setup.machine.state().dirty_rate.vcpu_dirty_rate = None;
    let info = client.execute("query-dirty-rate", json!({})).await.unwrap();
    assert!(info.get("vcpu-dirty-rate").is_none(), "{info}");
    let ring = json!({"calc-time": 1, "mode": "dirty-ring"});
    let refused = client.refused("calc-dirty-rate", ring).await;
    assert!(refused.contains("dirty-bitmap"), "{refused}");
}
