// An .onnx_adapter file (flatbuffer "TORT", format version 1), read with nothing but the standard library.
using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Text;

/// <summary>Something does not fit; the message names the file and the tensor.</summary>
public sealed class RefusedException : Exception
{
    public RefusedException(string what, string file, string tensor = null)
        : base(what + " [" + file + (string.IsNullOrEmpty(tensor) ? "" : ": " + tensor) + "]") { }
}

/// <summary>Type as ONNX numbers it: 1 is float32, 7 int64, 10 float16.</summary>
public sealed class AdapterTensor
{
    public int Type;
    public long[] Dims;
    public byte[] Data;

    public static int BytesOf(int type) { return type == 1 ? 4 : type == 7 ? 8 : type == 10 ? 2 : 0; }
    public static long Product(IEnumerable<long> dims) { return dims.Aggregate(1L, (a, b) => a * b); }
}

public sealed class AdapterFile
{
    readonly string path;
    readonly byte[] bytes;
    string tensor; // the one being read

    AdapterFile(string path)
    {
        this.path = path;
        if (!File.Exists(path)) throw new RefusedException("There is no such adapter file", path);
        bytes = File.ReadAllBytes(path);
    }

    public static Dictionary<string, AdapterTensor> Read(string path) { return new AdapterFile(path).Tensors(); }

    Dictionary<string, AdapterTensor> Tensors()
    {
        if (Text(4, 4) != "TORT") throw new RefusedException("The file is no ONNX Runtime adapter", path);
        long root = UInt32(0), version = Field(root, 0);
        if (version == 0 || Int32(version) != 1) throw new RefusedException("The adapter file is not of format version 1", path);
        var found = new Dictionary<string, AdapterTensor>();
        long start, n;
        Vector(Field(root, 3), out start, out n);
        for (long i = 0; i < n; i++)
        {
            tensor = null;
            long place = start + 4 * i, table = place + UInt32(place), at, length;
            Vector(Field(table, 0), out at, out length);
            tensor = Text(at, length);
            Vector(Field(table, 1), out at, out length);
            if (length > 8) throw new RefusedException("The adapter file is truncated or damaged", path, tensor);
            var dims = new long[length];
            for (int dim = 0; dim < dims.Length; dim++) dims[dim] = BitConverter.ToInt64(Part(at + 8 * dim, 8), 0);
            long type = Field(table, 2);
            Vector(Field(table, 3), out at, out length);
            var read = new AdapterTensor { Type = type == 0 ? 0 : Int32(type), Dims = dims, Data = Part(at, length) };
            int size = AdapterTensor.BytesOf(read.Type);
            if (size == 0 || length != AdapterTensor.Product(dims) * size)
                throw new RefusedException("The adapter's bytes are not those of its dtype and dims", path, tensor);
            if (found.ContainsKey(tensor)) throw new RefusedException("The adapter has two tensors of one name", path, tensor);
            found[tensor] = read;
        }
        return found;
    }

    byte[] Part(long start, long n)
    {
        if (start < 0 || n < 0 || start > bytes.Length || n > bytes.Length - start)
            throw new RefusedException("The adapter file is truncated or damaged", path, tensor);
        var part = new byte[n];
        Array.Copy(bytes, start, part, 0, n);
        return part;
    }

    string Text(long start, long n) { return Encoding.UTF8.GetString(Part(start, n)); }
    int Int32(long place) { return BitConverter.ToInt32(Part(place, 4), 0); }
    long UInt32(long place) { return BitConverter.ToUInt32(Part(place, 4), 0); }
    int UInt16(long place) { return BitConverter.ToUInt16(Part(place, 2), 0); }

    // Where a table's field is; 0 if it is left out.
    long Field(long table, int index)
    {
        long vtable = table - Int32(table), at = 4 + 2 * index;
        int offset = at < UInt16(vtable) ? UInt16(vtable + at) : 0;
        return offset == 0 ? 0 : table + offset;
    }

    void Vector(long place, out long start, out long n)
    {
        start = n = 0;
        if (place == 0) return;
        long length = place + UInt32(place);
        start = length + 4;
        n = UInt32(length);
    }
}
