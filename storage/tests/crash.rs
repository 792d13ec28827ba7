//! A process under load is killed at random moments; what it had acknowledged must still be there.

// A test fails by panicking, in its functions as in its body.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod load;

use load::{Kill, Said};

/// Does nothing in a normal run; as the process to be killed, works until it is.
#[test]
fn process_that_is_killed() {
    load::work_until_killed();
}

#[test]
fn nothing_acknowledged_is_lost_when_the_process_is_killed() {
    let seed = load::seed();
    let kills = load::kills(12);
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let mut said = Said::default();
    for round in 0..kills {
        let kill = Kill { folder: folder.path(), round, seed, level: "sync", environment: Vec::new() };
        kill.run(&mut said);
        let store = load::open(folder.path(), "sync");
        assert_eq!(store.damage(), []);
        runtime.block_on(load::inspect(store, &mut said, None));
    }
    println!("{} acknowledged, {} repeated after {kills} kills", said.acknowledged(), said.repeated);
    assert!(said.acknowledged() > 0);
}
