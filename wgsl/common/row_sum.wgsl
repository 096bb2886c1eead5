// The sum of one value per lane over the lanes of a row, in a fixed tree.
//
// `{{ lanes }}` consecutive threads (a power of two) are a row's lanes. Every thread of the workgroup must call it, in
// uniform control flow; it returns the same sum to all lanes of a row. Two values are summed at once.

var<workgroup> partial_sums: array<vec2<f32>, {{ workgroup }}>;

fn row_sum(thread: u32, value: vec2<f32>) -> vec2<f32> {
    let lane = thread % {{ lanes }}u;
    partial_sums[thread] = value;
    workgroupBarrier();
    for (var stride = {{ lanes }}u / 2u; stride > 0u; stride = stride / 2u) {
        if (lane < stride) {
            partial_sums[thread] = partial_sums[thread] + partial_sums[thread + stride];
        }
        workgroupBarrier();
    }
    return partial_sums[thread - lane];
}
