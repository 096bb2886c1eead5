// RMS norm without a weight, forward and backward (src/ops/rms_norm.rs).
//
//   forward    y = r x,                          r = 1 / sqrt(sum(x^2) / c + eps)
//   backward  gx = r gy - x (r^3 sum(x gy) / c)
//
// Layout: x, y, gy, gx are dense row-major [n, c] f32, read as rows of c / width elements of `width` floats each:
// vec4<f32> where c is a multiple of 4, f32 otherwise.
// Grid: `lanes` (a power of two) threads share a row, a workgroup takes workgroup / lanes rows, and workgroups are
// counted over x, then y.
// Invariants: every element of the output is written exactly once; threads of rows past the last read and write
// nothing but reach every barrier.
// Numerics: f32. A lane adds its elements in column order, the lanes are added in a fixed tree: equal bits every time.

alias Element = {{ element }};

struct Scalars {
    rows: u32,
    // Elements of a row.
    length: u32,
    columns: f32,
    eps: f32,
}

@group(0) @binding(0) var<storage, read_write> x: array<Element>;

// Forward.
@group(0) @binding(1) var<storage, read_write> y: array<Element>;
@group(0) @binding(2) var<uniform> of_forward: Scalars;

// Backward.
@group(0) @binding(1) var<storage, read_write> grad_y: array<Element>;
@group(0) @binding(2) var<storage, read_write> grad_x: array<Element>;
@group(0) @binding(3) var<uniform> of_backward: Scalars;

//#include "common/row_sum.wgsl"

fn inner(a: Element, b: Element) -> f32 {
    return {{ inner }};
}

fn inverse_rms(sum_of_squares: f32, scalars: Scalars) -> f32 {
    return 1.0 / sqrt(sum_of_squares / scalars.columns + scalars.eps);
}

// A thread's elements: begin, begin + lanes, ... below end.
struct Part {
    begin: u32,
    end: u32,
}

fn part_of(workgroup: vec3<u32>, workgroups: vec3<u32>, thread: u32, scalars: Scalars) -> Part {
    let rows_each = {{ workgroup }}u / {{ lanes }}u;
    let row = (workgroup.y * workgroups.x + workgroup.x) * rows_each + thread / {{ lanes }}u;
    if (row >= scalars.rows) {
        return Part(0u, 0u);
    }
    return Part(row * scalars.length + thread % {{ lanes }}u, (row + 1u) * scalars.length);
}

@compute @workgroup_size({{ workgroup }})
fn forward(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let part = part_of(workgroup, workgroups, thread, of_forward);
    var squares = 0.0;
    for (var i = part.begin; i < part.end; i += {{ lanes }}u) {
        squares += inner(x[i], x[i]);
    }
    let r = inverse_rms(row_sum(thread, vec2<f32>(squares, 0.0)).x, of_forward);
    for (var i = part.begin; i < part.end; i += {{ lanes }}u) {
        y[i] = x[i] * r;
    }
}

@compute @workgroup_size({{ workgroup }})
fn backward(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let part = part_of(workgroup, workgroups, thread, of_backward);
    var sums = vec2<f32>(0.0, 0.0);
    for (var i = part.begin; i < part.end; i += {{ lanes }}u) {
        sums += vec2<f32>(inner(x[i], x[i]), inner(x[i], grad_y[i]));
    }
    let sum = row_sum(thread, sums);
    let r = inverse_rms(sum.x, of_backward);
    let curvature = r * r * r * (sum.y / of_backward.columns);
    for (var i = part.begin; i < part.end; i += {{ lanes }}u) {
        grad_x[i] = grad_y[i] * r - x[i] * curvature;
    }
}
